"""Pictures of what a network sees; each module of pure functions has its job beside it."""
