"""HTTP itself: limits of requests, answers, problem details (RFC 9457). Begin at `middleware`."""
