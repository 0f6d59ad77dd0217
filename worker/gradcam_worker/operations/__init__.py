"""What the commands run on this machine: demo, doctor, local explanations, `top`, embedded servers.

Nothing below imports it. Begin at `doctor` or `explain`.
"""
