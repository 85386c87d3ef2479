"""triloom: tensor, pipeline and data parallel training under mpirun."""
