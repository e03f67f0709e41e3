"""English, with unambiguous dates and seconds."""
