from pathlib import Path
def folder(): return Path("/var/tmp/k8sbuild/bin")
def ensure(): return folder()
