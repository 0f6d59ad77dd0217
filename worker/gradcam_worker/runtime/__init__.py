"""What the processes of a worker are made of: devices, liveness, services, background loops, telemetry.

Begin at `processes.supervisor`, which starts the others; `service_factory` builds what they share.
"""
