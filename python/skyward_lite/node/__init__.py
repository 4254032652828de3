"""What runs on a node. Nothing here imports `client`."""
