"""Read and write weights in the layouts of other programs."""
