"""Parameters as trees of matrices: paths, rules, matrix views, shardings."""
