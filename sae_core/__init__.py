"""Train, read and attribute sparse autoencoders on attention outputs. Knows no SQL and no HTTP."""
