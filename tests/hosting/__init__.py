"""A real ComfyUI to test against: making it (host), starting it (server) and talking to it (client, graph)."""
