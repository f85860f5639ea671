"""`neuroada doctor`: what this machine has, and whether the project's claims hold on it.

    environment   versions, processors, GPUs; what is missing, and what it would be needed for
    check         what a check is, and what it finds
    checks        the list of all
    examine       runs checks one after the other, into doctor.json
    kernels       the kernels equal the definition
    packing       packed rows lose what padded ones do
    training      curves: the device against the CPU, engines against one process
    measured      memory and time of a step, beside other methods and beside the plan

docs/doctor.md says what each check claims, and its limit.
"""

from neuroada.doctor.check import Check, Found, NotHere, Place
from neuroada.doctor.checks import CHECKS
from neuroada.doctor.examine import examine
from neuroada.doctor.report import Report, Result, table

__all__ = ["CHECKS", "Check", "Found", "NotHere", "Place", "Report", "Result", "examine", "table"]
