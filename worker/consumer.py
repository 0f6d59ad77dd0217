"""Celery's consumer, made to survive messages that are no task messages.

A queue can be written to by strangers. As it comes, Celery's consumer ends the whole worker over a
malformed header or body (and gets the same message again when it is back), drops what it cannot
decode without a word to whoever sent it, and logs the contents.
"""

import logging
from functools import partial
from typing import Any

from celery.worker import request
from celery.worker.consumer import Consumer
from kombu.exceptions import DecodeError

from worker import envelope
from worker.errors import LedgerUnavailable

log = logging.getLogger("gradcam")

TURN_S = 1.0  # between two signs of life
CONNECT_EVERY_S = 0.5  # the pause before it is tried again; grows by as much each time
CONNECT_MAX_S = 5.0  # its longest, of half a minute as it comes: a broker that is back is work that waits


class Request(request.Request):  # type: ignore[misc]  # celery ships no types
    """A task in hand, that shows nobody who inspects this worker what its job says."""

    def info(self, safe: bool = True) -> Any:  # noqa: ARG002  # as Celery asks
        """See `celery.worker.request.Request`."""
        return super().info(safe=True)


class SturdyConsumer(Consumer):  # type: ignore[misc]  # celery ships no types
    """Hands every message that is no task to `app.refuse_message(message id, why)`, and goes on."""

    _turning: Any = None

    def on_ready(self) -> None:
        """Whenever the loop starts: from now on, each of its rounds is a sign of life."""
        super().on_ready()
        if self._turning:  # Celery keeps timers of an earlier connection that began where this one does
            self._turning.cancel()
        self.app.turned()
        self._turning = self.timer.call_repeatedly(TURN_S, self.app.turned)

    def ensure_connected(self, conn: Any) -> Any:
        """The connection, when it stands; tried again and again."""
        pauses = {"interval_start": CONNECT_EVERY_S, "interval_step": CONNECT_EVERY_S}
        conn.ensure_connection = partial(conn.ensure_connection, **pauses, interval_max=CONNECT_MAX_S)
        return super().ensure_connected(conn)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's handler of one message, in a net."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            why = message.headers.get(envelope.REFUSED)
            if why:  # `worker.channel` found that it is none
                self._refuse(message, str(why))
                return
            try:
                handle(message)
            except self.connection_errors:
                raise  # the broker's trouble, not the message's
            except Exception as error:  # noqa: BLE001  # whatever a malformed message leads to
                self._refuse(message, f"its headers or body are malformed ({type(error).__name__})")

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """The body is no JSON, or no list of arguments."""
        self._refuse(message, f"its body cannot be read as JSON ({type(exc).__name__})")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """Celery itself found it malformed, or its content type is not JSON."""
        why = "it cannot be read as JSON" if isinstance(exc, DecodeError) else type(exc).__name__
        self._refuse(message, f"it is malformed ({why})")

    def on_unknown_message(self, body: object, message: Any) -> None:  # noqa: ARG002
        """No task is named."""
        self._refuse(message, "it names no task")

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """A task of this name does not exist here."""
        name = str(message.headers.get("task"))[:60]
        known = sorted(task for task in self.app.tasks if task.startswith("gradcam."))
        self._refuse(message, f"there is no task {name!r}; there are {', '.join(known)}")

    def _refuse(self, message: Any, why: str) -> None:
        """Write down why, under the message's own id, then take it from the queue.

        Where the ledger is out of reach it goes back to the end of the queue, and comes again.
        """
        headers = message.headers if isinstance(message.headers, dict) else {}
        try:
            self.app.refuse_message(str(headers.get("id")), why)
        except LedgerUnavailable as error:
            log.warning("message %r goes back: %s", headers.get("id"), error)
            message.reject_log_error(log, self.connection_errors, requeue=True)
            return
        except Exception:
            log.exception("a message that is no job could not be written down")
        message.ack_log_error(log, self.connection_errors)
