"""Once-for-all super-networks: elastic in kernel, depth and width, and how they are trained."""
