"""Pages made of result files: this package reads rows and draws them, and computes nothing."""
