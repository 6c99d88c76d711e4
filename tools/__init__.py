"""Tools beside the library: the example data set, its metric, and the scripts that made the nano base."""
