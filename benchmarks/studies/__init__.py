"""Studies: which technique helps, by how much, and how sure that is."""
