"""Operations of triloom, one a file: needs torch only, nothing of the runtime and no process groups."""
