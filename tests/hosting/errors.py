"""Failures that people can do something about: dev.py prints the message alone, without a traceback."""

from __future__ import annotations


class HostError(Exception):
    """The host can't be made, started or used; the message says why and what to do."""


class ServerDied(HostError):
    """The ComfyUI server ended, or did not answer in time; the message ends with its last log lines."""


class PortTaken(HostError):
    """Another program listens on the port that was asked for."""


class PromptFailed(HostError):
    """ComfyUI refused a graph or a node failed while it ran; the message holds ComfyUI's own text."""
