"""The nodes and where they touch ComfyUI. Imports nothing itself: ``host_check`` must be able to come first."""
