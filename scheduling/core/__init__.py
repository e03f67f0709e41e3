"""Who goes next: policies, queue, admission, planning. Pure Python; no Django, torch or Redis."""
