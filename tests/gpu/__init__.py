"""A programme for one machine with one GPU: is training right on it, and how fast is it? `make gpu` runs it.

It needs torch, NumPy, OpenCV, Pillow, PyYAML, safetensors, SciPy and scikit-image, and neither Ray nor MLflow. All parts
take five minutes together; results are written as JSON and Markdown after each part.
"""

from gpu import records

records.work_without_pydantic()
