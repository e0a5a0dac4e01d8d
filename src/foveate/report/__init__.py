"""What a comparison looks like: one table for the terminal and the page, plots, and one self-contained HTML file."""

from .files import write_atomic
from .page import render, write
from .table import COLUMNS, Column, summary

__all__ = ["COLUMNS", "Column", "render", "summary", "write", "write_atomic"]
