"""Maps tensor names and layouts of other implementations to ours."""
