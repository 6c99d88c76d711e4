"""The parts of `tools/verify_base.py`: room (what the machine holds), oracle (diffusers), losses, pictures, report."""
