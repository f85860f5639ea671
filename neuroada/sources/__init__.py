"""Where models and data come from: pinned, verified, written under a temporary name and renamed when whole."""
