"""What surrounds the method in deepstyle.py, a concern a module. None of them imports deepstyle."""
