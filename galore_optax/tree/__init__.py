"""Parameters as trees of matrices: paths, plan, views, shardings."""
