"""Reading and writing weights in the layouts that the world uses."""
