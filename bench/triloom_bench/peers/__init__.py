"""What triloom is measured against: each peer in its best form, one file each, after its own documentation."""
