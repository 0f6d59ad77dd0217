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
    import fiftyone as tool

    dataset = tool.Dataset.from_dir(str(folder), tool.types.LegacyFiftyOneDataset)
    sample = dataset.first()
    return {
        "samples": len(dataset),
        "label": sample.prediction.label,
        "heat": Path(sample.heat.map_path).is_file(),
        "peak": int(sample.heat.get_map().max()) if hasattr(sample.heat, "get_map") else 255,
        "hot_regions": len(sample.hot_regions.detections),
        "heat_inside": dataset.bounds("heat_inside"),
        "cameras": sorted(dataset.distinct("camera")),
    }


READERS = {"coco": coco, "labelstudio": labelstudio, "mlflow": mlflow, "wandb": wandb, "fiftyone": fiftyone}

if __name__ == "__main__":
    os.environ.setdefault("WANDB_SILENT", "true")
    for _name in sys.argv[2:]:
        print(json.dumps({"format": _name, **READERS[_name](Path(sys.argv[1]) / _name)}), flush=True)
