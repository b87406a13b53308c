// What an exported package says in its lines of plain words, and its entries. Knows no model and no tokens.
#pragma once
#include <caffe2/serialize/inline_container.h>
#include <torch/version.h>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

using Refusal = std::runtime_error;  // what a person can mend, in one line
using Words = std::vector<std::string>;

inline Words words_of(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

struct Package {
  const std::string path;
  std::unique_ptr<caffe2::serialize::PyTorchStreamReader> archive;
  std::map<std::string, std::vector<Words>> lines;  // by their first word, without it

  explicit Package(const std::string& file) : path(file) {
    try {
      archive = std::make_unique<caffe2::serialize::PyTorchStreamReader>(path);
    } catch (const c10::Error&) {
      throw Refusal(path + ": cannot be read as a package: is it there, and whole?");
    }
    if (!archive->hasRecord("extra/runner.txt")) throw Refusal(path + ": was not exported by torchchat");
    std::istringstream stream(read("extra/runner.txt"));
    for (std::string key, rest; stream >> key && std::getline(stream, rest);) lines[key].push_back(words_of(rest));
    if (number("torchchat-package") != 1 || one("form").at(0) != "aotinductor" || one("device").at(0) != "cpu")
      throw Refusal(path + ": needs Python to run; export the model with --device cpu and torch 2.13 or newer");
    if (one("torch").at(0) != TORCH_VERSION)
      throw Refusal(path + ": was exported with torch " + one("torch")[0] + ", and this program has " TORCH_VERSION);
    std::ifstream cpuinfo("/proc/cpuinfo");
    const std::set<std::string> here(std::istream_iterator<std::string>(cpuinfo), {});
    for (const std::string& needed : one("instructions"))
      if (!here.count(needed)) throw Refusal(path + ": needs a processor with " + needed);
  }

  std::vector<Words> all(const std::string& key) const {
    return lines.count(key) ? lines.at(key) : std::vector<Words>();
  }
  Words one(const std::string& key) const {
    if (!lines.count(key)) throw Refusal(path + ": its " + key + " needs Python: use torchchat chat");
    return lines.at(key)[0];
  }
  long number(const std::string& key, size_t at = 0) const { return std::stol(one(key).at(at)); }
  std::string read(const std::string& entry) const {
    auto [data, size] = archive->getRecord(entry);
    return {static_cast<const char*>(data.get()), size};
  }
};
