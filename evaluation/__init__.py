"""Measuring edited language models: data, protocol, metrics and reports, on top of the plugin's public API."""
