#include "archs.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <sstream>

namespace apt {

bool has_code_for(const std::string& archs, int major, int minor) {
  std::istringstream listed(archs);
  std::string entry;
  while (std::getline(listed, entry, ';')) {
    if (entry.empty()) continue;
    int of_major = 0, of_minor = 0, end = 0;
    if (std::sscanf(entry.c_str(), "%d.%d%n", &of_major, &of_minor, &end) != 2) return true;
    std::string suffix = entry.substr(end);
    const bool one_gpu = suffix.rfind('a', 0) == 0, family = suffix.rfind('f', 0) == 0;
    if (one_gpu || family) suffix.erase(0, 1);
    const bool translates = suffix == "+PTX" && !one_gpu && !family;
    if (!suffix.empty() && suffix != "+PTX") return true;
    if (of_major == major && (one_gpu ? of_minor == minor : of_minor <= minor)) return true;
    if (translates && (of_major < major || (of_major == major && of_minor <= minor))) return true;
  }
  return false;
}

void check_gpu(const std::string& gpu, int major, int minor, const std::string& archs) {
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  TORCH_CHECK(has_code_for(archs, major, minor), "apt_ext has no code for ", gpu, " (compute capability ",
              capability, "): this build is for ", archs,
              "; rebuild it for this GPU: TORCH_CUDA_ARCH_LIST=", capability,
              " APT_WITH_CUDA=1 python -m pip install --no-build-isolation --force-reinstall --no-deps .");
}

}  // namespace apt
