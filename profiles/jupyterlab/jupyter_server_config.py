"""What `make lab` adds to JupyterLab's settings

JupyterLab writes its kernel's name and version into every notebook that it opens, and then marks
the notebook as unsaved. The committed notebooks hold neither. Here both are added on the way to
JupyterLab, and nothing is left to write. A contents manager of your own (jupytext's) is not
used: start `jupyter lab` itself for that."""

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class WithKernel(AsyncLargeFileManager):
    "Files as they are, but notebooks with the kernel that they are about to get"

    async def get(self, path, content=True, **kwargs):
        "A file or a folder"
        model = await super().get(path, content, **kwargs)
        if model["type"] == "notebook" and model["content"]:
            metadata = model["content"]["metadata"]
            if metadata.get("kernelspec", {}).get("name") == "python3":
                spec = self.parent.kernel_spec_manager.get_kernel_spec("python3")
                metadata["kernelspec"]["display_name"] = spec.display_name
                metadata["language_info"] = dict(IPythonKernel.language_info)
        return model


c = get_config()  # noqa: F821 (Jupyter gives it)
c.ServerApp.contents_manager_class = WithKernel
