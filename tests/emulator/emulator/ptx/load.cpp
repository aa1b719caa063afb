// load.cpp - the PTX that the build left in directories, ARCHITECTURE/*.ptx, by kernel.
#include <dirent.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <set>
#include <sstream>

#include "text.h"

namespace ptx {
struct Directory {
  std::map<std::string, std::string> file_of;  // path, by kernel
  std::map<std::string, std::shared_ptr<Module>> modules;
  std::string errors;  // of files that are no PTX
};
static std::vector<std::string>& directories() {
  static std::vector<std::string> d;
  return d;
}
void add_directory(const std::string& path) {
  auto& d = directories();
  if (std::find(d.begin(), d.end(), path) == d.end()) d.push_back(path);
}
static std::vector<std::string> listed(const std::string& path) {
  std::vector<std::string> names;
  if (DIR* d = opendir(path.c_str())) {
    while (dirent* f = readdir(d)) names.push_back(f->d_name);
    closedir(d);
  }
  std::sort(names.begin(), names.end());
  return names;
}
static std::string contents(const std::string& path) {
  std::ifstream f(path);
  std::stringstream s;
  s << f.rdbuf();
  return s.str();
}
static Module& module_of(Directory& d, const std::string& path, const std::string& file) {
  auto known = d.modules.find(path);
  if (known != d.modules.end()) return *known->second;
  auto m = parse(contents(path), file);  // may throw
  return *(d.modules[path] = m);
}
// Of the architectures that a device of this capability runs (90a only on 9.0), the newest.
static std::string choose(const std::string& root, int capability) {
  std::string best;
  int most = -1;
  for (auto& name : listed(root)) {
    int n = atoi(name.c_str());
    bool exact = !name.empty() && name.back() == 'a';
    if (n <= 0 || n > capability || (exact && n != capability) || n <= most) continue;
    most = n, best = name;
  }
  return best;
}
static std::map<std::pair<std::string, int>, Directory> all;  // by root and capability
static Directory& directory(const std::string& root, int capability) {
  auto [at, fresh] = all.try_emplace({root, capability});
  Directory& d = at->second;
  std::string architecture = fresh ? choose(root, capability) : "";
  if (architecture.empty()) return d;
  for (auto& file : listed(root + "/" + architecture)) {
    if (file.size() < 5 || file.substr(file.size() - 4) != ".ptx") continue;
    std::string path = root + "/" + architecture + "/" + file;
    try {
      for (auto& name : entries(module_of(d, path, architecture + "/" + file))) d.file_of[name] = path;
    } catch (const Error& e) {
      d.errors += "; " + e.text;  // the others' kernels are there all the same
    }
  }
  return d;
}
const Entry* find(const std::string& name, int capability) {
  std::string searched;
  for (auto& root : directories()) {
    Directory& d = directory(root, capability);
    auto file = d.file_of.find(name);
    if (file != d.file_of.end()) return entry(*d.modules[file->second], name);
    searched += " " + root + d.errors;
  }
  throw Error{"no PTX of kernel " + name + " for compute capability " + std::to_string(capability / 10) + "." +
              std::to_string(capability % 10) + " in" +
              (searched.empty() ? " any directory: none was named" : searched)};
}
std::set<std::string> carried_out() {
  std::set<std::string> lines;
  for (auto& directory : all) {
    for (auto& module : directory.second.modules) {
      for (auto& [kernel, compiled] : module.second->compiled) {
        for (auto& in : compiled->code) {
          if (!std::atomic_ref(in.ran).load(std::memory_order_relaxed)) continue;
          std::string text = in.text;
          std::replace_if(text.begin(), text.end(), [](char c) { return isspace((unsigned char)c); }, ' ');
          lines.insert(compiled->file + "\t" + kernel + "\t" + (in.inlined ? "1" : "0") + "\t" + text);
        }
      }
    }
  }
  return lines;
}
}  // namespace ptx
