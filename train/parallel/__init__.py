"""Device meshes, and runs of several processes."""
