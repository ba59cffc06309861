"""HTTP only: validation, wording of answers, streaming. What is generated is the engine's business."""
