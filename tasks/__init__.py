"""One Prefect task per step of the pipeline. No algorithm lives here: tasks call slimgpt and deploy."""
