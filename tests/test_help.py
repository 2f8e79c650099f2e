"""`--help` answers before anything heavy is imported."""
