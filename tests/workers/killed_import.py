"""An import or export that kills itself: killed_import.py ACTION SOURCE TARGET BYTES_OF_A_FILE TENSORS."""

import os
import signal
import sys
from pathlib import Path

from nemo_star.checkpoint import exporting, importing, safetensors_file, stream


def main(action, source, target, file_bytes, tensors):
    importing.MAX_FILE_BYTES = exporting.MAX_SHARD_BYTES = int(file_bytes)
    left = int(tensors)

    def dying(on_written):
        def counted():
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            on_written()

        return counted

    write_chunks, write_file = stream.write_chunks, safetensors_file.write_file
    importing.write_chunks = lambda out, chunks, on_written: write_chunks(out, chunks, dying(on_written))
    exporting.write_file = lambda out, shard, on_written: write_file(out, shard, dying(on_written))
    convert = importing.import_checkpoint if action == "import" else exporting.export_checkpoint
    convert(Path(source), Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
