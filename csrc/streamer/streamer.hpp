// The streamer runs one model through its region, step by step.
#pragma once
