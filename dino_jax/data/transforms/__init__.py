"""Image transforms that run on the device."""
