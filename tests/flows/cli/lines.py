"""What the command line answers to a mistake."""


def one_line(result):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in err
    return lines[0]
