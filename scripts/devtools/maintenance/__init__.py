"""What a maintainer runs now and then: releases, the JSON schemas of the wire, the shipped weights.

Begin with `release`.
"""
