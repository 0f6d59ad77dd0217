"""Run in an environment with the tools, never by this package: reads the exports below a folder.

    python read_all.py FOLDER coco labelstudio mlflow wandb fiftyone

Each export is FOLDER/<format>. What was read is printed as JSON, a line for each format.
"""

import json
import os
import sys
from pathlib import Path


def coco(folder: Path) -> dict[str, object]:
    """The loader of pycocotools, and its evaluation of hot boxes against true ones."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    hot = COCO(str(folder / "hot_boxes.json"))
    truth = COCO(str(folder / "truth.json"))
    found = truth.loadRes(str(folder / "results.json"))
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = [one["name"] for one in hot.loadCats(hot.getCatIds())]
    return {"images": len(hot.getImgIds()), "boxes": len(hot.getAnnIds()), "classes": names}


def labelstudio(folder: Path) -> dict[str, object]:
    """The interface parser of Label Studio's SDK checks the tasks, predictions and annotations."""
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((folder / "config.xml").read_text())
    interface.validate()
    tasks = json.loads((folder / "tasks.json").read_text())
    valid = [
        all(
            [
                interface.validate_task({"data": task["data"]}),  # with annotations it fails by itself
                *(interface.validate_prediction(one) for one in task["predictions"]),
                *(interface.validate_annotation(one) for one in task.get("annotations", ())),
            ]
        )
        for task in tasks
    ]
    return {"tasks": len(tasks), "valid": sum(valid)}


def mlflow(folder: Path) -> dict[str, object]:
    """MLflow's client finds the run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    [experiment] = [one for one in client.search_experiments() if one.name == "gradcam-audit"]
    [run] = client.search_runs([experiment.experiment_id])
    artifacts = [one.path for one in client.list_artifacts(run.info.run_id)]
    return {"metrics": run.data.metrics, "network": run.data.params["network"], "artifacts": artifacts}


def wandb(folder: Path) -> dict[str, object]:
    """W&B makes a table of it, and logs it in its offline mode."""
    import wandb as tool

    content = json.loads((folder / "explanations.table.json").read_text())
    table = tool.Table(columns=content["columns"], data=content["data"])
    run = tool.init(project="gradcam", mode="offline", dir=folder)
    artifact = tool.Artifact("explanations", type="dataset")
    artifact.add_dir(str(folder), skip_cache=True)
    run.log({"explanations": table, **json.loads((folder / "summary.json").read_text())})
    run.finish()
    return {"columns": table.columns, "rows": len(table.data)}


def fiftyone(folder: Path) -> dict[str, object]:
    """FiftyOne imports the dataset."""
    _without_mongod()
    import fiftyone as tool

    dataset = tool.Dataset.from_dir(str(folder), tool.types.LegacyFiftyOneDataset)
    samples = list(dataset)
    return {
        "labels": [one.prediction.label for one in samples],
        "truths": [one.ground_truth.classifications[0].label for one in samples],
        "heatmaps": [Path(one.heat.map_path).is_file() for one in samples],
        "peaks": [int(one.heat.get_map().max()) for one in samples],
        "hot_regions": [len(one.hot_regions.detections) for one in samples],
        "heat_inside": [one.heat_inside for one in samples],
        "cameras": [one.camera for one in samples],
    }


def _without_mongod() -> None:
    """Keep FiftyOne's documents in memory: its wheel downloads a server, which not every machine may."""
    if "FIFTYONE_DATABASE_URI" in os.environ:
        return
    os.environ.update(FIFTYONE_DATABASE_URI="mongodb://localhost", FIFTYONE_DISABLE_SERVICES="1")
    os.environ.update(FIFTYONE_DATABASE_VALIDATION="false", FIFTYONE_DO_NOT_TRACK="1")
    import mongoengine
    import mongomock
    import pymongo

    class Client(mongomock.MongoClient):  # type: ignore[misc]  # it has no types here
        _closed = False

        def server_info(self) -> dict[str, object]:
            return {"version": "7.0.0", "versionArray": [7, 0, 0, 0]}

    shared, connect = Client(), mongoengine.connect
    pymongo.MongoClient = lambda *_, **__: shared
    mongoengine.connect = lambda name, **others: connect(
        name, mongo_client_class=lambda **_: shared, **others
    )


READERS = {"coco": coco, "labelstudio": labelstudio, "mlflow": mlflow, "wandb": wandb, "fiftyone": fiftyone}

if __name__ == "__main__":
    os.environ.setdefault("WANDB_SILENT", "true")
    for _name in sys.argv[2:]:
        print(json.dumps({"format": _name, **READERS[_name](Path(sys.argv[1]) / _name)}), flush=True)
