// A frame is a fixed-size piece of physical device memory; the pool hands them out under the budget.
#pragma once
