"""The demo page: python -m flowmo.demo. `work` computes and needs no gradio, `page` is what the browser shows."""

from flowmo.demo.command import main

__all__ = ["main"]
