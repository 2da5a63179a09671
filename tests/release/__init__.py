"""What a release needs: the archive that people get, the registry's pictures and the checklist."""
