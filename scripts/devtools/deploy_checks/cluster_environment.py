"""The environment that a cluster gives to a container of the chart.

Of its ConfigMap, of a Secret, of its own variables; and, in pods of others beside it, a dozen variables for
each Service of the namespace (`enableServiceLinks`), which begin like settings where a release is called
gradcam.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from devtools.deploy_checks.wiring import Document, of_kind
from gradcam_worker.errors import InvalidSettings
from gradcam_worker.settings import PREFIX, Settings

ADDRESS = "10.96.0.7"


def service_links(documents: Iterable[Document]) -> dict[str, str]:
    """What Kubernetes sets in the pods of a namespace for the Services that are in it."""
    links: dict[str, str] = {}
    for service in of_kind([*documents], "Service"):
        if service["spec"].get("clusterIP") != "None":  # a headless one has no address
            links |= _links(service["metadata"]["name"], service["spec"]["ports"])
    return links


def _links(service: str, ports: list[dict[str, Any]]) -> dict[str, str]:
    name = service.upper().replace("-", "_")
    links = {f"{name}_SERVICE_HOST": ADDRESS}
    for port in ports:
        number, protocol = str(port["port"]), port.get("protocol", "TCP")
        url, link = f"{protocol.lower()}://{ADDRESS}:{number}", f"{name}_PORT_{number}_{protocol}"
        links.setdefault(f"{name}_SERVICE_PORT", number)  # the first one's
        links.setdefault(f"{name}_PORT", url)
        links |= {link: url, f"{link}_PORT": number, f"{link}_ADDR": ADDRESS}
        links[f"{link}_PROTO"] = protocol.lower()
        if "name" in port:
            links[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = number
    return links


def findings(documents: Iterable[Document]) -> Iterator[str]:
    """What settings make of the Services of a namespace, where they should pass over them."""
    documents = [*documents]
    for service in of_kind(documents, "Service"):
        name = service["metadata"]["name"]
        try:
            if Settings.from_environment(service_links([service])) != Settings():
                yield f"Service {name} changes settings"
        except InvalidSettings as error:
            yield f"Service {name}: {error}"


def given_by_the_chart(documents: Iterable[Document], pod: Document) -> dict[str, str]:
    """The variables of a pod that the chart itself knows: those of its ConfigMap, and its own."""
    (container,) = pod["spec"]["containers"]
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind([*documents], "ConfigMap")}
    names = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    variables = {name: str(value) for each in names for name, value in maps.get(each, {}).items()}
    return variables | {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


def settings_of(variables: dict[str, str]) -> Settings:
    """The settings that a process reads from them. Raises InvalidSettings where it would."""
    named = {name: value for name, value in variables.items() if name.startswith(PREFIX)}
    # The file's folder is there in a pod, and not here.
    return Settings.from_environment(
        {f"{PREFIX}BROKER_URL": "redis://somewhere:6379/0", **named, f"{PREFIX}REDIS_CA": ""}
    )
