"""What a maintainer runs now and then: releases, the JSON schemas of the wire.

Begin with `release`.
"""
