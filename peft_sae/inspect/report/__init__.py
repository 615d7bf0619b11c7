"""An inspection as one HTML page."""

from .page import html_report

__all__ = ["html_report"]
