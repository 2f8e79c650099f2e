"""Image retrieval and copy detection."""
