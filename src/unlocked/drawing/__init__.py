"""Timelines as people look at them: tables of text, and pictures."""

from .lanes import Colours, Lane, lane_curves, lanes
from .text import common_tick, text_table

__all__ = ["Colours", "Lane", "common_tick", "lane_curves", "lanes", "text_table"]
